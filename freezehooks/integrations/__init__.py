"""Callbacks for training frameworks, a file each; importing freezehooks imports none of them."""
