"""A plugin whose import fails, as one does when its own dependency is missing."""

import a_package_that_nobody_has  # noqa: F401


class Broken:
    """Never reached."""
