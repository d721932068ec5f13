"""The FAT paper's claims, tested again: what is trained, what is measured, and what may be concluded."""
