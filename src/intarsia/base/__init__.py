"""What every room stands on: errors for people, atomic files, fingerprints, progress, strict recipes. No torch."""
