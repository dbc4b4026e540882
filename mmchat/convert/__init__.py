"""Model files that mmchat makes out of a published checkpoint, one module per kind.

Each module has plan(), which reads headers only and says what the work takes, and run(), which does it.  Results are
complete or not there; what was interrupted goes on, or begins anew where it takes seconds.

This is a package, not scripts in tools/: `mmchat convert` is a command of an installed mmchat, which has no tools/.
"""
