"""What each stage can be told: names, defaults, descriptions and checks."""
