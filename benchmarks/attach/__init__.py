"""Which models of timm and torchvision `attach_transfer` can attach to, without their weights."""
