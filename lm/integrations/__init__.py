"""Our methods inside other people's trainers; each module needs the optional extra of its name."""
