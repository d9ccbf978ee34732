"""The simulator as it is meant to be read: plain Python, one function per thing that happens.

Time jumps from event to event. Everything that happens at one moment is taken in before any engine forms its next step;
engines then do so in the order of their numbers. `sim/kernel/` does the same over arrays, with the same functions in
modules of the same names, and gives the same results to the last bit; a test compares them event for event. Change both
or neither.

| module | what |
|---|---|
| `state` | requests, engines, and what a run consists of |
| `run` | arrivals, the queue of events, and when engines step |
| `steps` | what a step computes: vLLM's own rules |
| `prefill`, `decode` | what the schedulers of this project decide beforehand, by the functions of `core/scheduling` |
| `growth` | what requests are expected to take yet |
| `transfers` | KV on its way, held, and given up |
| `tokens` | what the end of a step brings |
"""

from vllm_disagg.sim.reference.run import Simulation

__all__ = ["Simulation"]
