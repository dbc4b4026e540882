"""A stand-in for rknn-toolkit-lite2, librknnrt and their model files; see README.md."""
