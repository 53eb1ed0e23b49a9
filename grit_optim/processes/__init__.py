"""Which processes train the pairs together, and how they exchange what each of them has."""
