"""What is promised of certificates, files and runs, and counted: one module a promise."""
