"""Callbacks for training frameworks, one file each over a shared base; `import freezehooks` imports none of them."""
