"""What a request will need, from what finished requests needed. Pure: no I/O, no clock."""
