"""Long repairs: K wrong tokens in K functions of a package, repaired one after another through a shell."""
