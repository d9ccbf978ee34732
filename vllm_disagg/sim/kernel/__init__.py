"""The simulator of `sim/reference/`, compiled: the same events in the same order, over arrays.

Read the reference first; modules and functions here have the names they have there, but for a leading underscore.
`blocks` is `sim/pool.py` and `times` is `core/latency.py`; `lists` has the queue of events and the queues of requests;
`compiled` says how all of it is compiled, and `pipeline`, `inference` and `lowering` make that quick. Rules that are
arithmetic are compiled from the very functions of `core/scheduling` that the engines call.

Two details keep results equal to the last bit: sums are written in the same order, and events of the same moment keep
the order in which they were pushed.
"""
