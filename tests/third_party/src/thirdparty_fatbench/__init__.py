"""A defense and an evaluation as a third party would bring them."""
