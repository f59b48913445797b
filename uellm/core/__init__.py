"""Plain data and errors that everything else is written in. Standard library only."""
