"""Element types, rounding and bit packing: facts about numbers, no policy.  Needs torch only."""
