"""The methods in the trainers that people use already; each module needs the library of its trainer."""
