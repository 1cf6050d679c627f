"""What looks at models from outside: comparing, predicting."""
