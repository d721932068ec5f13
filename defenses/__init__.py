"""The contestants, one small file each. A file's name is the name it is registered under."""
