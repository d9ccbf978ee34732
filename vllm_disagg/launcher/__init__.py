"""A deployment on one machine: a plan (`plan`, pure) becomes processes (`local`) that leave nothing behind."""
