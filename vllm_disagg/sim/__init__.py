"""A discrete-event simulator of prefill and decode instances, at the level of engine steps. One seed, one run."""
