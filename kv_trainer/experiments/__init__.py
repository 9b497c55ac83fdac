"""What is done around runs: looking at a recipe before it is given a night."""
