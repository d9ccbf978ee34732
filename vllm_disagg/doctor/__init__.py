"""`vllm-disagg doctor`: asks engines to probe each other, and says what is wrong and what to change."""
