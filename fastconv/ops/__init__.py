"""Public operations. Each normalises its arguments, chooses an algorithm and runs it; no arithmetic lives here."""
