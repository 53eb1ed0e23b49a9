"""How far each Fisher approximation is from the dense per-token one."""
