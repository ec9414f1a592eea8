"""What bench/loader.py times: its arms as processes (arms), torchvision's loader (theirs), the
stages of ours (stages), and the images (images)."""
