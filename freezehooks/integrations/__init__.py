"""Callbacks for training frameworks, a file each over a base that they share; importing freezehooks imports none."""
