"""What `gpu.sh` measured on a GPU, on one page."""
