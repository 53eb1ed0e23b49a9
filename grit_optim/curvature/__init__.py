"""The Fisher information of each site: its approximations, and the operators derived from them."""
