"""What a run would take, told before it begins: shapes, memory, FLOPs, rows that fit, samples of them."""
