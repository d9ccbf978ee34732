"""An emulated accelerator: vLLM's own engine around a device that computes nothing.

Only the forward pass is replaced. It takes as long as a profile says, and it leaves in the request's real KV blocks a
stamp for every token, from which, read back through the block table, the next token follows. What is real, what is
modelled and how accurate that is: `docs/emulation.md`.
"""
