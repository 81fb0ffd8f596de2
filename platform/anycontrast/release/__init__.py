"""Release: export a checkpoint, pull it elsewhere, load it and predict."""
