"""A library with the RKLLM ABI that runs a small model's LLM, for tests; README.md says what it is and is not."""
