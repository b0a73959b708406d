"""Files that `reap patch` places inside a site-packages folder. They may import torch and vllm; nothing here does."""
