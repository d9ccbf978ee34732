"""What runs next on one instance, as pure functions of plain values: the schedulers and the simulator call the same."""
