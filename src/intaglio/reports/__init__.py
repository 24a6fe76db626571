"""What a person looks at: proofs, the run's page, the summary in the terminal."""
