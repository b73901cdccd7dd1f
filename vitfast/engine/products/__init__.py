"""Linear layers and convolutions with their weights packed and kept between calls."""
