"""The examiners, one attack family a file. A file's name is the name it is registered under."""
