"""Names of timm, torchvision and transformers: pruned, quantized, exported and run, or refused."""
