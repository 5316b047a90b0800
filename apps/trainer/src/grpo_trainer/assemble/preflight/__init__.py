"""Does a run fit its slice? Read off its compiled programs."""
