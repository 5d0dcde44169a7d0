//go:build race

package services_test

const raceDetector = true
