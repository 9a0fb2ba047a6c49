"""The figures, one file each from recipe to picture; of long ones claims and picture stand in a second file."""
