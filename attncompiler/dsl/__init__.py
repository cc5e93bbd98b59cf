"""What users declare: masks and scores, as programs of the language."""
