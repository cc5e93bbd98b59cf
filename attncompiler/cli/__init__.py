"""The command line: `attncompiler explain | inspect | doctor`."""
