"""`vllm-disagg demo`: a real model split in two on one machine, and the models it and the tests use."""
