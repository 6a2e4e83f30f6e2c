"""OpenVLA's network (arXiv 2406.09246), small or as published, and what a published checkpoint's folder holds."""
