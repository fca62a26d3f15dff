"""Files and errors: what every other package may build on, and which itself imports none of them."""
