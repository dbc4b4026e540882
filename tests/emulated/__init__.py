"""The real rknn-toolkit-lite2 on an emulated aarch64; `python -m tests.emulated`, optional."""
