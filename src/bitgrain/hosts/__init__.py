"""Other programs and what they have in common with this one: each in a package of its own, which imports its host when it is used."""
