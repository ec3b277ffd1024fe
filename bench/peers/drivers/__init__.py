"""What runs inside the peers' own environments: plain files that import nothing of quire (quire's own driver aside)."""
