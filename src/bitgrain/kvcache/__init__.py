"""Keys and values of past tokens: how they are stored, and the stores."""
