"""A page in the browser that shows what a question does to a picture's features."""
